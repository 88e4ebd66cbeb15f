"""The built-in landscapes, and the pictures and the page that the demo leaves."""
