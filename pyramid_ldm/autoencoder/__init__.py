"""Stage one: the pyramid autoencoder and its loss."""
