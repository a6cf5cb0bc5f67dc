"""What every room of the stages may use: errors, events, figures as text, files and processes."""
