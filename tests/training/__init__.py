"""Tests of training over stages and replicas."""
