"""What is done with methods, encoders and data: runs, comparisons, plans, and the directories that they leave."""
