"""The `hf-longtrunc` command, a file a subcommand; a subcommand imports its packages when it runs."""
