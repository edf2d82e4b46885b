"""Sessions of any agent in a terminal: recorded, kept over a restart, and driven over HTTP
(docs/agent-session.md)."""
__all__ = ["AISession", "ExecuteResult", "SessionConfig", "SessionError", "SessionManager",
           "UnknownSession"]


def __getattr__(name):  # a host, of which there is one per session, needs none of them
    if name in __all__:
        from . import session
        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
