"""Files, images, processes and error messages, for all other packages."""
