/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The linker is told by this file that it links a C library; the code is Rust.
 * ISO C wants a translation unit to declare something. */
typedef int qcow2rs_stub;
