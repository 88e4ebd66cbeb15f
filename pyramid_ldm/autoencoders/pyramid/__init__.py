"""The learned pyramid autoencoder (PDM section 3.2)."""
