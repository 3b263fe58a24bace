"""What is tested and measured on a machine that is lent for 15 minutes: ``bench/gpu.sh``, docs/gpu-day.md."""
