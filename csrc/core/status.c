/* status.c: the last failure's sentence, one per thread. */
#include <stdarg.h>
#include <stdio.h>

#include "core/core.h"

static _Thread_local char sentence[512];

const char *kvc_last_error(void) { return sentence; }

kvc_status kvc_fail(kvc_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return status;
}
