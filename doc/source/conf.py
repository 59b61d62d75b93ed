project = "nova_ftvm"
copyright = "nova_ftvm contributors"
extensions: list[str] = []
html_theme = "alabaster"
exclude_patterns: list[str] = []
