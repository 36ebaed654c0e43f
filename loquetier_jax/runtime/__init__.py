"""The engine loop, which turns scheduling decisions into dispatched steps."""
