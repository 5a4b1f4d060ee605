/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The least a C program can do with the library: it links, and header and
 * library are of the same version. */
#include <qcow2rs.h>

#include "harness.h"

int main(void)
{
    CHECK_EQ(qcow2rs_version_number(), QCOW2RS_VERSION_NUMBER);
    CHECK_STR(qcow2rs_version_string(), QCOW2RS_VERSION_STRING);
    CHECK_STR(qcow2rs_error_message(), "");
    puts(qcow2rs_version_string());
    return 0;
}
