"""The positions room: where a token stands, apart from which token it is."""
