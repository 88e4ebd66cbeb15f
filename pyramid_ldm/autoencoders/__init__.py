"""Stage one: images to latent pyramids and back."""
