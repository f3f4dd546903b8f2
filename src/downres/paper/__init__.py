"""The paper's experiments (Morlier, Léonardon, Gripon 2025, arXiv 2504.03749): what is trained, looked at, drawn."""
