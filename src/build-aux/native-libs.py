#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Prints the system libraries that a Rust static library needs.

usage: native-libs.py RUSTC TARGET   (TARGET may be empty: the host)
"""

import subprocess
import sys
import tempfile

rustc, target = sys.argv[1:]
with tempfile.TemporaryDirectory() as out:
    command = [rustc, '--print', 'native-static-libs', '--crate-type', 'staticlib',
               '--crate-name', 'empty', '--out-dir', out, '-']
    if target:
        command += ['--target', target]
    run = subprocess.run(command, input='', text=True, stderr=subprocess.PIPE)
if run.returncode != 0:
    sys.exit(run.stderr)

# What the C compiler adds by itself: naming libgcc_s would forbid -static.
IMPLIED = ('-lc', '-lgcc_s')

libs = []
for line in run.stderr.splitlines():
    _, found, list_ = line.partition('native-static-libs:')
    if found:
        libs = [lib for lib in list_.split() if lib not in IMPLIED]
# The last mention counts: a library comes after those that need it.
print(' '.join(lib for i, lib in enumerate(libs) if lib not in libs[i + 1:]))
