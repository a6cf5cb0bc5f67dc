"""The pipeline itself: reads one YAML file, plans its stages and runs them. Never imports torch."""
