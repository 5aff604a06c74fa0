"""Measurements. Every published figure comes from one of these scripts; none of them is a test."""
