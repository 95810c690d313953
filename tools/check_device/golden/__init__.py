"""Numbers of the official implementation, read by the checks and by the tests."""
