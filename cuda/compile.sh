#!/bin/sh
# The compiler's command, which fails where ptxas serializes products of wgmma, too: it only remarks on that, and a
# kernel is several times slower then. For builds with KVCOMP_WERROR.
said=$("$@" 2>&1)
status=$?
[ -z "$said" ] || printf '%s\n' "$said" >&2
case $said in
*serialized*) [ $status -ne 0 ] || status=1 ;;
esac
exit $status
