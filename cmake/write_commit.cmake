# cmake -DSOURCE=dir -DOUTPUT=file -P write_commit.cmake: the commit that is being built, for the records that strobe writes. A tree
# without its history (an archive) says it through the environment variable STROBE_COMMIT.
execute_process(COMMAND git -C ${SOURCE} describe --always --dirty --abbrev=12 --exclude=*
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  set(commit "unknown")
  if(DEFINED ENV{STROBE_COMMIT})
    set(commit "$ENV{STROBE_COMMIT}")
  endif()
endif()
set(text "// Written at each build.\n#pragma once\n\n#define STROBE_COMMIT \"${commit}\"\n")
set(old "")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} old)
endif()
if(NOT old STREQUAL text)
  file(WRITE ${OUTPUT} "${text}")
endif()
