"""A cluster on one machine: Ray and the controller here."""
