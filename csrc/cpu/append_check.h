/* append_check.h: what append and append_walk refuse. */
#pragma once
#include "kvcomp/append.h"

/* append's arguments without the rows. */
kvc_append_walk_args kvc_append_walk_of(const kvc_append_args *args);
kvc_status kvc_append_walk_check(const kvc_append_walk_args *args);
