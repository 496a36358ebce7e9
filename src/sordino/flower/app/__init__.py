"""The folder that `flwr run` takes: an app of Flower's, whose two ends are those of the installed Sordino."""
