"""One file a version; none is changed after its release."""
