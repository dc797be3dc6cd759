"""The `hf-longtrunc` command, a file a subcommand; what a subcommand needs is imported when it runs."""
