"""raysv finds the margin, scale, temperature and augmentation strength that a speaker-verification encoder needs."""
