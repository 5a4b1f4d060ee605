/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What every C test needs: a check that says where it failed, and ends the
 * program.  Exit status 77 tells meson that a test does not apply here. */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK_FAILED(...)                                              \
    do {                                                               \
        fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, __func__);  \
        fprintf(stderr, __VA_ARGS__);                                  \
        fputc('\n', stderr);                                           \
        exit(EXIT_FAILURE);                                            \
    } while (0)

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) {                                            \
            CHECK_FAILED("not so: %s", #condition);                    \
        }                                                              \
    } while (0)

/* Two integers; prints both. */
#define CHECK_EQ(a, b)                                                 \
    do {                                                               \
        long long check_a = (long long)(a), check_b = (long long)(b);  \
        if (check_a != check_b) {                                      \
            CHECK_FAILED("%s is %lld, not %s = %lld", #a, check_a, #b, \
                         check_b);                                     \
        }                                                              \
    } while (0)

/* Two strings; prints both. */
#define CHECK_STR(a, b)                                                \
    do {                                                               \
        const char *check_a = (a), *check_b = (b);                     \
        if (strcmp(check_a, check_b) != 0) {                           \
            CHECK_FAILED("%s is \"%s\", not \"%s\"", #a, check_a,      \
                         check_b);                                     \
        }                                                              \
    } while (0)

/* A call that must succeed: >= 0; prints the library's message otherwise. */
#define CHECK_OK(call)                                                 \
    do {                                                               \
        long long check_ret = (long long)(call);                       \
        if (check_ret < 0) {                                           \
            CHECK_FAILED("%s is %lld: %s", #call, check_ret,           \
                         qcow2rs_error_message());                     \
        }                                                              \
    } while (0)

#define SKIP(why)                                                      \
    do {                                                               \
        fprintf(stderr, "skipped: %s\n", why);                         \
        exit(77);                                                      \
    } while (0)

#endif /* HARNESS_H */
