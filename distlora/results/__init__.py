"""Show what a command found: its values once, as text, Markdown, JSON, pictures and pages. Imports no torch."""
