"""The methods that DiDi is compared with, one file each."""
