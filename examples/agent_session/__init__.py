"""Sessions of any agent in a terminal: recorded, kept over a restart, and driven over HTTP. docs/agent-session.md."""
