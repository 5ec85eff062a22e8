"""Objectives: how distortion, rate and an objective's own terms combine into a loss. One file each."""
