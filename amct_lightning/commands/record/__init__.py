"""The subcommand that shows, converts and compares record files."""
