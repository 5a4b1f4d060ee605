/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Memory of caches that goes back to the system. */
#include "disk.h"

#define SIZE (1u << 30)

static unsigned char data[65536];

static uint64_t held(struct qcow2rs_image *img)
{
    struct qcow2rs_stats stats;

    CHECK_OK(qcow2rs_get_stats(img, &stats, sizeof(stats)));
    return stats.metadata_bytes;
}

int main(void)
{
    char *path = temp_path("image");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_open_opts *open_opts;
    struct qcow2rs_image *img;
    uint64_t full, i;
    int64_t given;

    CHECK_OK(qcow2rs_open_opts_new(&open_opts));
    CHECK_OK(qcow2rs_open_opts_set(open_opts, "cache-clean-interval", "0"));
    CHECK_ERR(qcow2rs_open_opts_set(open_opts, "cache-clean-interval", "x"),
              EINVAL);
    CHECK_OK(qcow2rs_create_opts_set(o, "preallocation", "metadata"));
    CHECK_OK(qcow2rs_create_path(path, 0, o, open_opts, &img));
    for (i = 0; i < SIZE; i += 32u << 20)
        CHECK_OK(qcow2rs_pread(img, data, sizeof(data), i, 0));
    full = held(img);
    CHECK(qcow2rs_trim_caches(img) == 0);
    given = qcow2rs_trim_caches(img);
    CHECK(given >= 32 * 4096);
    CHECK_EQ(held(img), full - (uint64_t)given);
    CHECK_OK(qcow2rs_pread(img, data, sizeof(data), 0, 0));
    CHECK_OK(qcow2rs_close(&img));
    CHECK(qcow2rs_trim_caches(NULL) == -EINVAL);
    qcow2rs_open_opts_free(&open_opts);
    qcow2rs_create_opts_free(&o);
    free(path);
    return 0;
}
