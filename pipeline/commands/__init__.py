"""The commands: one thin function for each."""
