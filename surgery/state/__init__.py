"""The state of a training that is interrupted: what is trained, its optimizer, random numbers and place in the data."""
