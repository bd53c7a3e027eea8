"""What tests of several areas use. No test module imports another one."""
