project = "nova_ftvm"
copyright = "nova_ftvm contributors"  # noqa: A001 - Sphinx's name
extensions: list[str] = []
html_theme = "alabaster"
exclude_patterns: list[str] = []
