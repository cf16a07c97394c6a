"""The frozen backbone with its token heads and router, their losses and their folder."""
