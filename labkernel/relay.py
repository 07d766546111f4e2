def parse_publish(t): return t
