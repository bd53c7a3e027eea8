"""Problems whose solution is known."""
