/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Version, features, the error record, the log callback. */
#include <errno.h>
#include <pthread.h>
#include <qcow2rs.h>

#include "harness.h"

static void version(void)
{
    CHECK_EQ(QCOW2RS_MAKE_VERSION(1, 2, 3), 0x010203);
    CHECK_EQ(QCOW2RS_VERSION_NUMBER,
             QCOW2RS_MAKE_VERSION(QCOW2RS_VERSION_MAJOR, QCOW2RS_VERSION_MINOR,
                                  QCOW2RS_VERSION_PATCH));
    CHECK_EQ(qcow2rs_has_feature("zlib"), 1);
    CHECK_EQ(qcow2rs_has_feature("direct-io"), 1);
    CHECK_EQ(qcow2rs_has_feature("ofd-locks"), 1);
    CHECK_EQ(qcow2rs_has_feature(""), 0);
    CHECK_EQ(qcow2rs_has_feature("no such feature"), 0);
}

static void *other_thread(void *unused)
{
    (void)unused;
    CHECK_STR(qcow2rs_error_message(), "");
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_NONE);
    CHECK_EQ(qcow2rs_has_feature("\xff"), -EINVAL);
    CHECK_STR(qcow2rs_error_message(), "name is not UTF-8");
    return NULL;
}

static void errors(void)
{
    pthread_t thread;

    CHECK_STR(qcow2rs_error_message(), "");
    CHECK_EQ(qcow2rs_has_feature(NULL), -EINVAL);
    CHECK_STR(qcow2rs_error_message(), "name is NULL");
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_NONE);

    /* Success leaves the record alone, and so do other threads. */
    CHECK_EQ(qcow2rs_has_feature("zlib"), 1);
    CHECK_EQ(pthread_create(&thread, NULL, other_thread, NULL), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_STR(qcow2rs_error_message(), "name is NULL");
}

static void code_names(void)
{
    uint32_t a, b;

    CHECK_STR(qcow2rs_error_code_name(QCOW2RS_E_NONE), "none");
    CHECK_STR(qcow2rs_error_code_name(QCOW2RS_E_CORRUPT), "corrupt");
    CHECK_STR(qcow2rs_error_code_name(QCOW2RS_E_DIRTY), "dirty");
    CHECK_STR(qcow2rs_error_code_name(QCOW2RS_E_DIRTY + 1), "unknown");
    CHECK_STR(qcow2rs_error_code_name(UINT32_MAX), "unknown");
    for (a = 0; a <= QCOW2RS_E_DIRTY; a++) {
        for (b = 0; b < a; b++) {
            CHECK(strcmp(qcow2rs_error_code_name(a),
                         qcow2rs_error_code_name(b)) != 0);
        }
    }
}

static void on_log(void *opaque, uint32_t level, const char *target,
                   const char *msg)
{
    int *calls = opaque;

    CHECK(level >= QCOW2RS_LOG_ERROR && level <= QCOW2RS_LOG_TRACE);
    CHECK(target[0] != '\0');
    CHECK(strchr(msg, '\n') == NULL);
    ++*calls;
}

static void log_callback(void)
{
    int calls = 0;

    qcow2rs_set_log(on_log, &calls, QCOW2RS_LOG_TRACE);
    qcow2rs_set_log(on_log, &calls, QCOW2RS_LOG_ERROR);
    qcow2rs_set_log(NULL, NULL, QCOW2RS_LOG_TRACE);
    qcow2rs_set_log(NULL, NULL, 0);
}

int main(void)
{
    version();
    errors();
    code_names();
    log_callback();
    qcow2rs_free(NULL);
    return 0;
}
