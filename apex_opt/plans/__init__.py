"""Plans: parallel templates, engine settings, their text form and the memory they need."""
