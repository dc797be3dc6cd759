"""Between rows and attention: where a token stands, apart from which token it is."""
