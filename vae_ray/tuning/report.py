"""placeholder"""


def write_report(directory, records, table): ...
