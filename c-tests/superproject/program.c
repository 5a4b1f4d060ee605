/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include <qcow2rs.h>
#include <stdio.h>

int main(void)
{
    printf("qcow2rs %s\n", qcow2rs_version_string());
    return qcow2rs_version_number() == QCOW2RS_VERSION_NUMBER ? 0 : 1;
}
