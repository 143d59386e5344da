"""Pictures and videos to and from files."""
