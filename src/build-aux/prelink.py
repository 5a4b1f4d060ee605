#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Makes one object of a Rust archive, with only the API symbols global.

usage: prelink.py LD OBJCOPY MAP ARCHIVE OUTPUT
"""

import re
import subprocess
import sys
import tempfile

ld, objcopy, map_, archive, output = sys.argv[1:]
with open(map_) as file:
    symbols = re.findall(r'^\s*(qcow2rs_\w+);', file.read(), re.MULTILINE)
if not symbols:
    sys.exit(f'{map_}: no symbols')

roots = [flag for symbol in symbols for flag in ('-u', symbol)]
subprocess.run([ld, '-r', '--gc-sections', *roots, '-o', output, archive], check=True)
with tempfile.NamedTemporaryFile('w', suffix='.symbols') as file:
    file.write(''.join(symbol + '\n' for symbol in symbols))
    file.flush()
    # Bitcode of Rust's LLVM makes older binutils plug-ins abort.
    subprocess.run([objcopy, f'--keep-global-symbols={file.name}',
                    '-R', '.llvmbc', '-R', '.llvmcmd', output], check=True)
