"""What a comparison and the recorded results leave to be looked at."""
