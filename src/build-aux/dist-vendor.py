#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Puts the crates that the library is built from into the archive that
`meson dist` makes, so that it builds offline.

usage: dist-vendor.py CARGO   (MESON_DIST_ROOT is set by meson)
"""

import os
import subprocess
import sys

root = os.environ['MESON_DIST_ROOT']
# cargo prints the configuration that makes it use what it has copied.
config = subprocess.run([sys.argv[1], 'vendor', '--locked', 'vendor'], cwd=root,
                        check=True, text=True, stdout=subprocess.PIPE).stdout
os.makedirs(os.path.join(root, '.cargo'), exist_ok=True)
with open(os.path.join(root, '.cargo', 'config.toml'), 'w') as file:
    file.write(config)
