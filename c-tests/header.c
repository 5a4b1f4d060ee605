/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The header alone, twice, as C and as C++: it needs nothing before it. */
#include <qcow2rs.h>
#include <qcow2rs.h>

#if QCOW2RS_VERSION_NUMBER < QCOW2RS_MAKE_VERSION(0, 1, 0)
#error "the version cannot be used in a condition"
#endif

int main(void)
{
    return qcow2rs_version_number() == QCOW2RS_VERSION_NUMBER ? 0 : 1;
}
