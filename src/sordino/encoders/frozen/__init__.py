"""Operations of frozen towers with a backward pass of their own."""
