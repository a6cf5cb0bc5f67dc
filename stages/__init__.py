"""One file a stage; files that start with an underscore hold what several stages share."""
